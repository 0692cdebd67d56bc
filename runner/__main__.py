"""Entry of the image: run as a file, because what Python takes to run a folder would be a sixth of a zygote's memory."""

import sys

sys.path.append("/opt/mayfly")

from runner.main import main

main()
