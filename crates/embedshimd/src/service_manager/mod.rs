//! The service manager, systemd or `embedshimd keep`: what it hands to a daemon at its start
//! ([`activation`]), the daemon's client ([`ServiceManager`]), and the datagrams between the two
//! ([`message`], which the keeper reads). Never decides what is stored under which name.

pub(crate) mod activation;
mod client;
pub(crate) mod message;
mod outgoing;
mod store_usage;

pub(crate) use client::ServiceManager;
