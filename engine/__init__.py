"""A trained model: checkpoints, generation, losses, and which token pulls which."""
