from spilt.cli import main  # PYTHON_ARGCOMPLETE_OK

raise SystemExit(main())
