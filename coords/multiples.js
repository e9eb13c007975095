// Layers x heads at a glance: one small picture per head.
