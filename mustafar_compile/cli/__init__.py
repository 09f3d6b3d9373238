"""The command ``mustafar``, a file for each of its commands. What they share: options, models, output."""
