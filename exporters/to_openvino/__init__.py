"""Export to OpenVINO IR."""
