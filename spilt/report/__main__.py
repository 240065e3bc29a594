import sys

from spilt.report import main

sys.exit(main())
