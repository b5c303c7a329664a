"""How the pocket model was trained: batches, curriculum, losses, distillation, evaluation. Not packaged."""
