"""Where a stream goes and comes from: real KVM, or a simulated kernel. `base` says what both can do."""
