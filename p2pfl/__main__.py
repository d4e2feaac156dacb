"""`python -m p2pfl` and the command `p2pfl`."""

from p2pfl.cli import main

if __name__ == "__main__":
    main()
