"""`python -m netsuke VERB` is `netsuke VERB`."""

from netsuke.cli import main

main()
