"""What every run needs and nobody has to read to learn a method."""
