"""What a search leaves behind, for people."""
