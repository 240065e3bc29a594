import sys

from spilt.export import main

sys.exit(main())
