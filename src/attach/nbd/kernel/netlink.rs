//! The kernel's NBD client, told over generic netlink (include/uapi/linux/nbd-netlink.h).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use neli::consts::nl::NlmF;
use neli::consts::socket::NlFamily;
use neli::err::RouterError;
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder};
use neli::nl::NlPayload;
use neli::router::synchronous::NlRouter;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;
use neli::{Size, ToBytes};

const FAMILY: &str = "nbd";
const VERSION: u8 = 1;

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

/// A device to make.
#[derive(Clone, Copy, Debug)]
pub struct NewDevice<'a> {
    /// Bytes.
    pub size: u64,
    /// Bytes of a logical block.
    pub block_size: u32,
    /// Transmission flags, as a server would tell them.
    pub flags: u16,
    /// After so long a request is sent again, over another connection.
    pub timeout: Duration,
    /// So long requests wait when there is no connection.
    pub dead_timeout: Duration,
    /// Shown in sysfs; whoever gives the device new connections has to know it.
    pub identifier: &'a str,
}

/// A way to talk to the kernel's client.
pub struct Client {
    router: NlRouter,
    family: u16,
}

fn other(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

/// What the kernel answers as an error number, other failures by their text.
fn answer<T, P>(error: RouterError<T, P>) -> io::Error
where
    RouterError<T, P>: std::fmt::Display,
{
    match error {
        RouterError::Nlmsgerr(error) => io::Error::from_raw_os_error(error.error().saturating_abs()),
        error => other(error),
    }
}

fn attribute<P: Size + ToBytes>(kind: u16, payload: P) -> io::Result<Nlattr<u16, Buffer>> {
    let kind = AttrTypeBuilder::default().nla_type(kind).build().map_err(other)?;
    NlattrBuilder::default().nla_type(kind).nla_payload(payload).build().map_err(other)
}

fn sockets(sockets: &[BorrowedFd<'_>]) -> io::Result<Nlattr<u16, Buffer>> {
    let mut list = attribute(SOCKETS, Vec::<u8>::new())?;
    for socket in sockets {
        let number = u32::try_from(socket.as_raw_fd()).map_err(other)?;
        let item = attribute(SOCK_ITEM, Vec::<u8>::new())?.nest(&attribute(SOCK_FD, number)?).map_err(other)?;
        list = list.nest(&item).map_err(other)?;
    }
    Ok(list)
}

impl Client {
    /// Finds the client.
    ///
    /// # Errors
    /// `NotFound` when the kernel has none, or what else the system says.
    pub fn open() -> io::Result<Self> {
        let (router, _) = NlRouter::connect(NlFamily::Generic, None, Groups::empty()).map_err(answer)?;
        let family = router.resolve_genl_family(FAMILY).map_err(answer)?;
        Ok(Self { router, family })
    }

    /// Makes a device over connections that are in transmission already, on the first index that is free: its index.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn connect(&self, device: &NewDevice<'_>, connections: &[BorrowedFd<'_>]) -> io::Result<u32> {
        let attributes = [
            attribute(SIZE_BYTES, device.size)?,
            attribute(BLOCK_SIZE_BYTES, u64::from(device.block_size))?,
            attribute(SERVER_FLAGS, u64::from(device.flags))?,
            attribute(TIMEOUT, device.timeout.as_secs())?,
            attribute(DEAD_CONN_TIMEOUT, device.dead_timeout.as_secs())?,
            attribute(BACKEND_IDENTIFIER, device.identifier)?,
            sockets(connections)?,
        ];
        let index = self.call(CONNECT, attributes)?;
        index.ok_or_else(|| other("the kernel connected a device and did not say which"))
    }

    /// Gives a device connections in place of dead ones; those that are one too many are let go of.
    ///
    /// # Errors
    /// `InvalidInput` when the device is not connected, or not with this identifier, or what else the kernel says.
    pub fn reconnect(&self, index: u32, identifier: &str, connections: &[BorrowedFd<'_>]) -> io::Result<()> {
        let attributes = [attribute(INDEX, index)?, attribute(BACKEND_IDENTIFIER, identifier)?, sockets(connections)?];
        self.call(RECONFIGURE, attributes).map(|_| ())
    }

    /// Disconnects a device, whoever uses it: what they wait for fails.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn disconnect(&self, index: u32) -> io::Result<()> {
        self.call(DISCONNECT, [attribute(INDEX, index)?]).map(|_| ())
    }

    /// Sends a command and waits until it is done: the index in the answer.
    fn call<const N: usize>(&self, command: u8, attributes: [Nlattr<u16, Buffer>; N]) -> io::Result<Option<u32>> {
        let attributes: GenlBuffer<u16, Buffer> = attributes.into_iter().collect();
        let message = GenlmsghdrBuilder::<u8, u16>::default().cmd(command).version(VERSION).attrs(attributes);
        let message = NlPayload::Payload(message.build().map_err(other)?);
        let answers =
            self.router.send::<_, _, u16, Genlmsghdr<u8, u16>>(self.family, NlmF::ACK, message).map_err(answer)?;
        let mut index = None;
        for message in answers {
            let message = message.map_err(answer)?;
            if let NlPayload::Payload(payload) = message.nl_payload() {
                index = payload.attrs().get_attr_handle().get_attr_payload_as::<u32>(INDEX).ok().or(index);
            }
        }
        Ok(index)
    }
}
