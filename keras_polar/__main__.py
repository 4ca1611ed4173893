"""`python -m keras_polar`."""

from keras_polar.cli import main

main()
