"""`python -m ofadiff`, and `accelerate launch -m ofadiff` on several processes."""

from ofadiff.commands.app import main

if __name__ == "__main__":
    main()
