import sys

from paligemma.support.command_line import main

sys.exit(main())
