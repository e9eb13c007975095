// The orbit view: a token in the centre, its sources at their distances.
