from spilt.cli import main

raise SystemExit(main())
