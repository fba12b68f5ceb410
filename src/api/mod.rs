//! HTTP only: router, wire types, handlers, error bodies, server-sent events.
