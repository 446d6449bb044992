"""Feature distillation: losses on the inner layers of a teacher and a student."""
