"""python -m spilt.downstream is spilt tasks."""

import sys

from spilt.downstream import main

sys.exit(main())
