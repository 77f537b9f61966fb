import sys

from paligemma.inference import main

sys.exit(main())
