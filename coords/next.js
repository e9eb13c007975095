// What would come next, layer by layer, and without a head.
