// Small charts as SVG: lines and points with axes.
