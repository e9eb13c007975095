"""A trained model: checkpoints, generation, and which token pulls which."""
