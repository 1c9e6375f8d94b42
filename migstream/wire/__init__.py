"""construct schemas: the bytes as formats/SPEC.md draws them. Nothing here runs once per register."""
