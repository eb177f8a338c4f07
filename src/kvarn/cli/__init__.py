"""To be written."""
def main() -> None:
    """Entry point."""
