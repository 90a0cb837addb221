//! An agent that was replaced does no more than serve its open connections: its successor has the listeners. Normally it
//! is then told to stop. Where instead the successor goes (an upgrade that is rolled back, or that crashes), nobody would
//! take new connections; so the one that is left starts again, which takes the listeners back.

use std::{path::Path, time::Duration};

use tokio::{net::UnixStream, time::sleep};

const LOOK: Duration = Duration::from_secs(1);
/// While one agent takes the socket over from another, it is nobody's for a moment.
const LOOKS: u32 = 3;

/// Returns when nobody serves the admin socket any more, although this agent did once.
pub async fn outlived(socket: &Path) {
    let mut nobody = 0;
    while nobody < LOOKS {
        sleep(LOOK).await;
        nobody = if UnixStream::connect(socket).await.is_ok() { 0 } else { nobody + 1 };
    }
}
