"""`python -m adjoint_jax` is `adjoint-jax`."""

from .cli import main

if __name__ == "__main__":
    main()
