"""`python -m dfadc`, also under torchrun."""

from dfadc.cli.main import main

if __name__ == "__main__":
    main()
