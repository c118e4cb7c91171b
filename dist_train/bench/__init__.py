"""What ``dist-train bench`` measures on this machine."""
