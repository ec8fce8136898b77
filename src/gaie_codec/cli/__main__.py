"""`python -m gaie_codec.cli`."""

from . import main

main()
