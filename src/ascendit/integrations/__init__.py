"""ascendit inside other libraries. Each module registers itself when it is imported."""
