//! Machines of their own on one cable: network namespaces, joined by a bridge. Gone with their value.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The bridge's own address, for servers.
pub const SERVER: &str = "10.213.78.1";

/// Names are for the machine, tests run side by side.
static SERIAL: AtomicUsize = AtomicUsize::new(0);

pub struct Networks {
    name: String,
    count: usize,
}

impl Networks {
    /// A namespace for servers, at [`SERVER`], and `count` for nodes, at most 200.
    pub fn new(count: usize) -> Self {
        let name = format!("fr-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let networks = Self { name, count };
        let server = networks.server();
        ip(&["netns", "add", &server]);
        ip(&["-n", &server, "link", "set", "lo", "up"]);
        ip(&["-n", &server, "link", "add", "switch", "type", "bridge"]);
        ip(&["-n", &server, "addr", "add", &format!("{SERVER}/24"), "dev", "switch"]);
        ip(&["-n", &server, "link", "set", "switch", "up"]);
        for number in 0..count {
            let (node, port) = (networks.node(number), format!("port{number}"));
            ip(&["netns", "add", &node]);
            ip(&["-n", &node, "link", "set", "lo", "up"]);
            ip(&["-n", &node, "link", "add", "cable", "type", "veth", "peer", "name", &port, "netns", &server]);
            ip(&["-n", &node, "addr", "add", &format!("10.213.78.{}/24", number + 10), "dev", "cable"]);
            ip(&["-n", &node, "link", "set", "cable", "up"]);
            ip(&["-n", &server, "link", "set", &port, "master", "switch", "up"]);
        }
        networks
    }

    /// Moves this thread, and with it the processes and threads that it will start, to where servers are.
    pub fn enter_server(&self) {
        enter(&self.server());
    }

    /// Moves this thread to node `number`.
    pub fn enter_node(&self, number: usize) {
        enter(&self.node(number));
    }

    fn server(&self) -> String {
        format!("{}-server", self.name)
    }

    fn node(&self, number: usize) -> String {
        format!("{}-{number}", self.name)
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        for name in (0..self.count).map(|number| self.node(number)).chain([self.server()]) {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

fn enter(name: &str) {
    let file = File::open(format!("/run/netns/{name}")).unwrap();
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("ip runs (Debian package iproute2)");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
