"""`python -m ysnake_kernels.native` compiles the code for this processor, and says where it is."""

import sys

from ysnake_kernels.native.build import BuildError, library, location


def main() -> int:
    """The exit code: 0 if the code is compiled, 1 if it cannot be."""
    try:
        library()
    except BuildError as error:
        print(f"cannot compile the code for this processor: {error}", file=sys.stderr)
        return 1
    print(f"compiled for this processor: {location()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
