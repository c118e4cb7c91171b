"""What a trained network is worth, measured once per image and written down."""
