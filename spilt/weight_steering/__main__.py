import sys

from spilt.weight_steering import main

sys.exit(main())
