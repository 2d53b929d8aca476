// The memory server of go-imap: one user, "username" with "password", and no TLS. Argument: the address.
package main

import (
	"log"
	"os"

	idle "github.com/emersion/go-imap-idle"
	"github.com/emersion/go-imap/backend/memory"
	"github.com/emersion/go-imap/server"
)

func main() {
	s := server.New(memory.New())
	s.Addr = os.Args[1]
	s.AllowInsecureAuth = true
	s.Enable(idle.NewExtension())
	log.Fatal(s.ListenAndServe())
}
