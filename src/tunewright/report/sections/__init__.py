"""The page's sections: each module is a pure function from the evidence to a section, or to None."""
