//! Carrick control plane.
