"""`python -m paligemma`: the command."""

import sys

from paligemma.support.command_line import main

if __name__ == "__main__":
    sys.exit(main())
