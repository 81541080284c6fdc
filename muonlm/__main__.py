"""`python -m muonlm` is `muonlm`."""

from muonlm.cli.main import main

raise SystemExit(main())
