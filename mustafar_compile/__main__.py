"""``python -m mustafar_compile`` is ``mustafar``."""

from .cli.app import main

if __name__ == "__main__":
    main()
