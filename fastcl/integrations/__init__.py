"""fastcl inside other libraries; each module needs its library and is imported by who uses it."""
