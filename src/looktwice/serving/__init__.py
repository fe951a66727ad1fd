"""Files that run where looktwice is not installed, but for `modeling_ovis2_5`, which hands it over."""
