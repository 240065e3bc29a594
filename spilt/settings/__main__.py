import sys

from spilt.settings.copy import main

sys.exit(main())
