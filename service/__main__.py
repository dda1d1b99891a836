"""`python -m service` is `slimpajama`."""

from service.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
