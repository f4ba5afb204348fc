"""The stages of the pipeline and what runs them. A stage knows no other stage."""
