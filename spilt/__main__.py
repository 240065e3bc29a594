# PYTHON_ARGCOMPLETE_OK
from spilt.cli import main

if __name__ == "__main__":
    raise SystemExit(main(program="python -m spilt"))
