"""What makes byte-pair encoding fast."""
