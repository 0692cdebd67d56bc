"""Entry of the image: the directory /opt/mayfly is run, so this import is absolute."""

from runner.main import main

main()
