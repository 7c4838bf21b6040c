"""`python -m heretic`."""

from .main import main

main()
